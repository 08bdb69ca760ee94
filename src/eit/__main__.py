from eit.cli import main

main()
