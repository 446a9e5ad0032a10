"""Files: written whole or not at all, read without running code, checked before use."""


class FileError(ValueError):
    """A file that cannot be read, written or used: names the file and what is wrong with it."""


class OtherKind(FileError):
    """A file that cannot be read as one of the kind that was asked for."""
