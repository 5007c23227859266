"""What this machine is: its probes, its devices, and the checks of CUDA."""
