"""The console command: `densefeat pretrain`, `densefeat probe`, `densefeat head`, `densefeat interpolate`."""
