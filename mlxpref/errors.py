"""The errors of mlxpref: each message names the problem, its place and the remedy; the command line prints it."""


class MlxprefError(Exception):
    """The base of all errors of mlxpref; itself raised for failures of other processes."""


class ConfigError(MlxprefError):
    """A setting, an option or an output place that cannot be used as asked."""


class DataError(MlxprefError):
    """Images or preferences that are missing, damaged or inconsistent."""


class UnknownSplitError(ConfigError, DataError):
    """A split that data do not have."""


class ImageError(DataError):
    """One image that cannot be read: its name, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class ModelError(MlxprefError):
    """A checkpoint or an adapter that cannot be found, loaded or combined."""
