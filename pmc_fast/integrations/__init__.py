"""PMC in other people's trainers."""
