"""The engine: plan on the CPU, execute on the device, commit on the CPU."""
