# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The units and the config of the role, as text: what no scenario with an emulated kernel would notice."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
import pytest
import yaml
from ansible.plugins.filter.core import FilterModule

from ansible_collections.integrity.ima.plugins.module_utils._protocol import load

ROLE = Path(__file__).resolve().parents[3] / "roles/ima_snapshot"
TEMPLATES = ROLE / "templates"
HARDENING = "{% include 'hardening.j2' %}"


def settings(name: str) -> list[tuple[str, str]]:
    """Key and value of each line that systemd reads, what is included with it."""
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    text = text.replace(HARDENING, (TEMPLATES / "hardening.j2").read_text(encoding="utf-8"))
    return re.findall(r"^([A-Za-z]+)=(.*)$", text, re.MULTILINE)


def rendered(name: str, **given: str) -> str:
    """The file that the template makes of the role's defaults."""
    env = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True)
    env.filters.update(FilterModule().filters())
    env.tests["match"] = lambda text, form: re.match(form, text) is not None
    values = yaml.safe_load((ROLE / "defaults/main.yml").read_text(encoding="utf-8"))
    values.update({"ansible_managed": "Ansible managed"}, **given)
    own = yaml.safe_load((ROLE / "vars/main.yml").read_text(encoding="utf-8"))
    for each in ("__ima_snapshot_heading", "__ima_snapshot_written"):
        values[each] = env.compile_expression(own[each][2:-2])(**values)
    return env.get_template(name).render(values)


@pytest.mark.parametrize("name", ["ima-snapshot-export.service.j2", "ima-snapshot-shutdown.service.j2"])
def test_sys_stays_writable_for_what_trims(name):
    found = settings(name)
    # strict leaves /sys as it is; each of the others makes it, or securityfs below it, read-only or hides it
    assert ("ProtectSystem", "strict") in found
    keys = {key for key, _value in found}
    assert not keys & {"ProtectKernelTunables", "ReadOnlyPaths", "InaccessiblePaths", "TemporaryFileSystem"}
    assert not keys & {"MountAPIVFS", "RootDirectory", "RootImage", "DynamicUser", "PrivateUsers", "User"}
    (capabilities,) = (value for key, value in found if key == "CapabilityBoundingSet")
    assert "CAP_SYS_ADMIN" in capabilities.split()


def test_the_tail_is_exported_before_the_file_systems_go():
    found = settings("ima-snapshot-shutdown.service.j2")
    # systemd-kexec, -reboot, -poweroff and -halt all require shutdown.target: what conflicts with it is stopped first
    assert ("Conflicts", "shutdown.target") in found and ("Before", "sysinit.target shutdown.target") in found
    assert ("After", "local-fs.target") in found and ("RemainAfterExit", "true") in found
    (stop,) = (value for key, value in found if key == "ExecStop")
    assert stop.endswith(" export"), "all of it, not only what is due"


@pytest.mark.parametrize("name", ["ima-snapshot-export.service.j2", "ima-snapshot-shutdown.service.j2"])
def test_without_the_directory_of_the_stitched_lists_the_units_start(name):
    text = rendered(name, ima_snapshot_stitched="/run/ima-snapshot", ima_snapshot_lock="/run/lock/ima/lock")
    # systemd takes the minus only inside of the quotes; without spool or lock there is nothing to export
    paths = re.findall(r"^ReadWritePaths=(.*)$", text, re.MULTILINE)
    assert paths == ['"/var/lib/ima-snapshot"', '"/run/lock/ima"', '"-/run/ima-snapshot"']


@pytest.mark.parametrize("managed", ["Ansible managed", "two\nlines", "of a block\n", "a blank \n\nand none\r\n", ""])
def test_whatever_ansible_managed_says_is_a_comment(managed, tmp_path):
    for path in sorted(TEMPLATES.glob("*.*.j2")):
        plain, other = (rendered(path.name, ansible_managed=said).splitlines() for said in ("Ansible managed", managed))
        assert plain[:3] == ["#", "# Ansible managed", "#"]
        # what follows is the same, and what comes first is nothing but comments without blanks at their ends
        head = len(other) - len(plain) + 3
        assert other[head:] == plain[3:]
        assert all(re.match(r"#( \S|\Z)", line) and line == line.strip() for line in other[:head])
    config = tmp_path / "snapshot.conf"
    config.write_text(rendered("snapshot.conf.j2", ansible_managed=managed, ima_snapshot_name="h"), encoding="utf-8")
    assert load(str(config)).spool == "/var/lib/ima-snapshot"
