"""What is raised for something that a user can set right."""


class UserError(ValueError):
    """Something that the user can fix. Its message is shown without a traceback."""


def say_how_to_install(error: ModuleNotFoundError) -> str:
    """Of a package that only the commands need that show a batch or a run."""
    return f"no package {error.name}: pip install -r launch/requirements.txt in the repository, or pip install 'wsft[look]'"
