"""
What a user can do something about. A script shows these errors as a single line; any other
exception is a mistake of ours and keeps its traceback.

    raise UserError(f'temperature must be at least 0, not {temperature}')
"""

import errno
import re


class UserError(ValueError):
    """What was given, what is allowed, what to do."""


class MissingFile(FileNotFoundError):
    """The path of what is missing, and the command that makes it."""


class NotFinite(FloatingPointError):
    """A loss, a gradient or a weight became infinite or not a number."""


class OutOfMemory(MemoryError):
    """What needs less memory."""


USER_ERRORS = (UserError, MissingFile, NotFinite, OutOfMemory)
OUT_OF_MEMORY = ("out of memory|can't allocate memory|STATUS_ALLOC_FAILED|Storage size .* overflowed|"
                 'could not (create|construct) a (primitive|memory) descriptor')


def kind_of(error):
    """The name of an error's class, of Python's own where it is one of these."""
    kinds = [kind for kind in type(error).__mro__ if not issubclass(kind, USER_ERRORS)]
    return kinds[0].__name__


def in_one_line(error):
    """The line that a user needs; None for an error that needs its traceback."""
    if isinstance(error, USER_ERRORS):
        message = str(error).replace('\n', '\\n')  # an argument may contain line ends
        return f'{kind_of(error)}: {message}'
    if is_of_the_machine(error):
        where = f'{error.filename} can\'t be used: ' if error.filename else ''
        reason = error.strerror or str(error).strip().partition('\n')[0]
        return f'{kind_of(error)}: {where}{reason}'
    if is_out_of_memory(error):
        return (f'MemoryError: out of memory{amount_asked(error)}: a smaller batch, fewer tokens or '
                'a smaller model need less')
    if is_compiler_failure(error):
        reason = str(error).strip().partition('\n')[0][:200]
        return f'{kind_of(error)}: torch.compile failed, --compile=False runs without it ({reason})'
    return None


def is_of_the_machine(error):
    """Whether a disk or a network failed, or refused access. A file that is missing unforeseen is a
    mistake of ours."""
    is_one = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    return is_one and error.errno != errno.ENOMEM


def is_out_of_memory(error):
    """Whether Python, NumPy, the system or PyTorch, which raises a RuntimeError, lacked memory."""
    if isinstance(error, RuntimeError):
        return re.search(OUT_OF_MEMORY, str(error)) is not None
    is_system_s = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_system_s or isinstance(error, MemoryError)


def amount_asked(error):
    """What PyTorch's allocators and NumPy say was asked for, in brackets; '' if they don't say."""
    in_bytes = re.search(r'tried to allocate (\d+) bytes', str(error))
    if in_bytes:
        return f' ({int(in_bytes[1]) / 2**30:,.1f} GiB asked for)'
    in_words = re.search(r'allocate ([\d.]+ [KMGTP]iB)', str(error))
    return f' ({in_words[1]} asked for)' if in_words else ''


def is_compiler_failure(error):
    """Whether a compiler behind torch.compile failed. An error in the compiled code itself is none:
    its traceback shows the line of the model."""
    kinds = [f'{kind.__module__}.{kind.__name__}' for kind in type(error).__mro__]
    of_compilers = ('torch._dynamo.exc.BackendCompilerFailed', 'torch._inductor.', 'triton.')
    return any(kind.startswith(of_compilers) for kind in kinds)
