from setuptools import setup


setup()  # all metadata: pyproject.toml
