"""The exception for what a user can fix, and texts of errors."""


class UserError(ValueError):
    """Something that the user can fix. Its message is printed without a traceback."""


def first_line(error: Exception) -> str:
    """Of its message, which of other packages may be a page long."""
    return str(error).strip().split("\n")[0]


def how_to_install(error: ModuleNotFoundError) -> str:
    """The message for a missing package that only wsft.inspect and wsft.report need."""
    return f"no package {error.name}: pip install -r launch/requirements.txt in the repository, or pip install 'wsft[look]'"
