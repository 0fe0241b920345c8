"""What can this machine do? Probes that measure it, and the device figures that follow."""
