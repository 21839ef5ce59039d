from perturbdiff.cli.main import main

main()
