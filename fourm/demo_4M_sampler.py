"""Published import path of the demo sampler; the code is in :mod:`fourm.generation`."""

from fourm.generation.demo_sampler import Demo4MSampler, img_from_url

__all__ = ["Demo4MSampler", "img_from_url"]
