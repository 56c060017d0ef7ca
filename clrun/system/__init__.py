"""What touches the machine: files and locks, devices and processes, random seeds, errors, optional libraries."""
