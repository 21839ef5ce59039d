from perturbdiff.cli import main

main()
