"""How the stand-in refuses: a message for stderr and an exit code."""


class Refused(Exception):
    """Input that the real tool would not take; ``code`` is the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def need(condition: object, message: str) -> None:
    """Refuses unless the condition holds."""
    if not condition:
        raise Refused(message)
