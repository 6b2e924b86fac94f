"""PMC in the frameworks that people train with; each module needs the framework that it is named after."""
