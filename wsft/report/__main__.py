import sys

from wsft.errors import say_how_to_install

try:
    from wsft.report.page import main
except ModuleNotFoundError as error:
    sys.exit(f"report: error: {say_how_to_install(error)}")

main()
