"""What every room may use: errors, durable files, console output, environment, versions."""
