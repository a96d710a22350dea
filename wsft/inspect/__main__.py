import sys

from wsft.errors import say_how_to_install

try:
    from wsft.inspect.terminal import main
except ModuleNotFoundError as error:
    sys.exit(f"inspect: error: {say_how_to_install(error)}")

main()
