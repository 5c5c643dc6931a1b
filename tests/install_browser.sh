#!/bin/sh
# Chromium for the tests of the report: the one that is there, the system's package, or playwright's.
for name in "$TWOTOWER_CHROMIUM" chromium chromium-browser google-chrome; do
    if [ -n "$name" ] && command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Chromium for the tests of the report (apt-get)"
    apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 && exit 0
    apt-get update -qq >/dev/null 2>&1
    apt-get install -y -qq --no-install-recommends chromium >/dev/null 2>&1 && exit 0
fi
echo "installing Chromium for the tests of the report (playwright)"
timeout 300 "$1/playwright" install chromium >/dev/null 2>&1 && exit 0
echo "WARNING: there is no Chromium, and it could not be installed: the report is not tested" >&2
