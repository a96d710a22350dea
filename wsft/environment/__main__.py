from wsft.environment.server import main

main()
