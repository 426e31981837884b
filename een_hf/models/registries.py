"""Names for the parts that a model is put together from; outside classes join them by the same functions."""


class ExitConfigurationError(ValueError):
    """An exit setting that does not fit the network, the problem or the data."""


class Registry(dict):
    """Parts by name.

    Args:
        setting: where a user names one, for messages: `exit_pooling (--exit_pooling)`.
    """

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def __missing__(self, name: str):
        """
        Raises:
            ExitConfigurationError: an unknown name; the known ones are listed.
        """
        raise ExitConfigurationError(
            f"{self.setting} is {name!r}; it must be one of: {', '.join(sorted(map(str, self)))}."
        )
