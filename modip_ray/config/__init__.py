"""Typed settings: load, stack, override, validate, dump. A run saves what it resolved to; code never changes what the user set.

fields.py: the fields and their types. files.py: defaults, tasks, --config files and overrides, stacked. rules.py: ranges, and relations between fields.
tree.py, yaml_data.py: strict trees and YAML, which studies and searches read with, too.
"""

from modip_ray.config.fields import Config as Config
from modip_ray.config.fields import Resources as Resources
from modip_ray.config.fields import Task as Task
from modip_ray.config.files import config_dir as config_dir
from modip_ray.config.files import load as load
from modip_ray.config.files import parse_override as parse_override
from modip_ray.config.files import task_names as task_names
from modip_ray.config.rules import ConfigError as ConfigError
from modip_ray.config.tree import nearest as nearest
from modip_ray.config.yaml_data import parse_scalar as parse_scalar
from modip_ray.config.yaml_data import read_yaml as read_yaml
