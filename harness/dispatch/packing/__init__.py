"""Many small tasks on few devices: which one starts next."""
