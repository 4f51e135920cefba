"""The reproducible companion of CAF (IJCAI 2024): infrared and visible image fusion with a searched loss.

The names in __init__.pyi, which completion shows, are imported on first use.
"""
__version__ = "0.1.0"

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
