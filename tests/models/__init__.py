from lightning_utilities.core.imports import RequirementCache

# timm 1.0.24 saves safetensors into a local-dir but cannot read them there.
SAFETENSORS = bool(RequirementCache("timm>=1.0.31"))
