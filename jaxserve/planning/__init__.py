"""What a configuration will take on a device: memory, bytes and seconds, before it runs."""
