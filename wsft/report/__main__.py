import sys

from wsft.errors import how_to_install

try:
    from wsft.report.page import main
except ModuleNotFoundError as error:
    sys.exit(f"report: error: {how_to_install(error)}")

main()
