"""The console command `nlu`, and the entry point of the launch scripts."""
