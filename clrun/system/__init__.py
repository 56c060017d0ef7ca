"""Access to the machine: files and locks, devices and processes, random seeds, errors, third-party libraries."""
