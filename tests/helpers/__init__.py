"""What tests share; some of it is run as a program."""
