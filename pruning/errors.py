"""The errors in a user's input, as one tree.

    VitfrontError (ValueError)
    ├── ModelError             a model that cannot be created or is not of a supported family
    │   └── CheckpointError    weights whose names or shapes do not fit the model
    ├── DataError              images or classes that are missing, empty or broken
    ├── PlanError              a plan that does not fit its model
    ├── ArtifactError          a saved model that cannot be written or read
    └── SettingError           a setting out of its range or unknown (`search` adds its own below this one)
        └── TargetError        a size that no plan of the model has

Each message is one line: what is wrong, the value, and what would do. Our own mistakes are `assert`s.
"""


class VitfrontError(ValueError):
    """The root of all errors in a user's input; the command line prints it as one line and exits with 2."""


class ModelError(VitfrontError):
    """A model that cannot be created or is not of a supported family."""


class CheckpointError(ModelError):
    """Weights whose names or shapes do not fit the model."""


class DataError(VitfrontError):
    """Images or classes that are missing, empty or broken."""


class PlanError(VitfrontError):
    """A plan that does not fit its model."""


class ArtifactError(VitfrontError):
    """A saved model that cannot be written or read."""


class SettingError(VitfrontError):
    """A setting out of its range or unknown."""


class TargetError(SettingError):
    """A size that no plan of the model has."""


def first_line_of(error: Exception) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
