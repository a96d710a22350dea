import sys

from wsft.errors import how_to_install

try:
    from wsft.inspect.terminal import main
except ModuleNotFoundError as error:
    sys.exit(f"inspect: error: {how_to_install(error)}")

main()
