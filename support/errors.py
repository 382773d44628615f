"""
What a user can do something about. A script shows these errors as a single line; any other exception is a
mistake of ours and keeps its traceback.

    raise UserError(f'temperature must be at least 0, not {temperature}')
"""


class UserError(ValueError):
    """What was given, what is allowed, what to do."""


class MissingFile(FileNotFoundError):
    """The path of what is missing, and the command that makes it."""


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight became infinite or not a number."""


class OutOfMemory(MemoryError):
    """What needs less memory."""


USER_ERRORS = (UserError, MissingFile, NotFinite, OutOfMemory)


def kind_of(error):
    """The name of an error's class, of Python's own where it is one of these."""
    return (type(error).__base__ if isinstance(error, USER_ERRORS) else type(error)).__name__
