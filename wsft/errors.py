"""The exception for what a user can fix."""


class UserError(ValueError):
    """Something that the user can fix. Its message is printed without a traceback."""


def how_to_install(error: ModuleNotFoundError) -> str:
    """The message for a missing package that only wsft.inspect and wsft.report need."""
    return f"no package {error.name}: pip install -r launch/requirements.txt in the repository, or pip install 'wsft[look]'"
