"""Running on a SLURM cluster: what it offers, names of hosts, batch scripts."""
