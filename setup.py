"""Puts the folders `data` and `configs`, which are beside the package, into the wheel."""

from setuptools import find_packages, setup

ASSETS = "zegformer_jax.assets"  # runtime/assets.py reads them there
FOLDERS = ("configs", "data")

setup(
    packages=[
        *find_packages(include=["zegformer_jax*"]),
        *(f"{ASSETS}.{folder}" for folder in FOLDERS),
    ],
    package_dir={f"{ASSETS}.{folder}": folder for folder in FOLDERS},
    package_data={f"{ASSETS}.data": ["**/*"]},
)
