"""Errors of a sweep, below the tree in `pruning.errors`.

VitfrontError
└── SettingError
    ├── ConfigError    a recipe or an option that is unknown or out of range
    └── SweepError     a sweep that is missing, busy, or was started with other settings
"""

from pruning.errors import SettingError


class ConfigError(SettingError):
    """A recipe or an option that is unknown or out of range."""


class SweepError(SettingError):
    """A sweep that is missing, busy, or was started with other settings."""
