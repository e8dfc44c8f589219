"""The transform of each kind of modality; ``fourm.data.modality_transforms`` registers and applies them."""
