from deltaserve.cli.main import main

main()
