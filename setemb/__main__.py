from setemb.cli import main

main()
