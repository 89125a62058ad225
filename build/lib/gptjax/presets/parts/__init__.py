"""Named presets of models, data sets, optimizers and meshes. Nothing but data."""
