"""Drop-ins for other Laplace libraries; each module imports its library, none is imported by the package itself."""
