"""The console command `densefeat`: one module a command, listed in `main.COMMANDS`."""
