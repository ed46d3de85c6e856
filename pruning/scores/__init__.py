"""How much is lost if a unit goes: one file a criterion; larger = keep."""
