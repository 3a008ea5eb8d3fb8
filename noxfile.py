# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# /// script
# dependencies = ["nox>=2025.02.09", "antsibull-nox"]
# ///

"""The sessions of antsibull-nox.toml: `nox --list`."""

import antsibull_nox
import nox

antsibull_nox.load_antsibull_nox_toml()


if __name__ == "__main__":
    nox.main()
