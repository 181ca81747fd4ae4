"""audiokernels inside other libraries; each module imports what it integrates."""
