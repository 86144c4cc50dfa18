"""What pyproject.toml cannot say: the wheel has the repository's configs/ in the package, as ldm/configs."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["ldm", "ldm.*"]), "ldm.configs"],
    package_dir={"ldm.configs": "configs"},
    package_data={
        "ldm.configs": ["**/*.yaml", "**/*.txt"],
        "ldm.reports": ["templates/*"],
        "ldm.storybook": ["assets/**/*", "README.md"],
    },
)
