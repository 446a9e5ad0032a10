"""Files and streams: what a user has is not lost, and what is wrong is said in one line.

writing.py    files and folders that are written whole or not at all, the lock of a folder
tensors.py    files of tensors, read without running code and checked before use
streams.py    stdout and stderr, errors in one line, signals
"""


class FileError(ValueError):
    """A file that cannot be read, written or used: names the file and what is wrong with it."""


class OtherKind(FileError):
    """A file that cannot be read as one of the kind that was asked for."""
