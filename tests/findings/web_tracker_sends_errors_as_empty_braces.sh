#!/usr/bin/env bash
# One expects: a tracker of web pages sends of an error at least its message, of a date what it is in JSON, and leaves
# out what is undefined, as JSON does.
# What happens: @aliyun-sls/web-track-browser makes a text of each field, by JSON.stringify of what is an object and by
# String of anything else. So an Error, whose message and stack are not enumerable, arrives as "{}", a Map too; a Date
# or URL arrives with quotes within its text; undefined arrives as the word. An Error given as the log itself is a log
# without a field. Nothing is thrown, and the put succeeds.
# Why it matters: `tracker.send({ page, error })` in a catch block, what such a tracker is for, keeps the page and
# loses the error; that is seen when somebody needs it. A field of a date can't be parsed as one.
# Needs node 18 or newer, npm; installs what it runs into a temporary folder.
set -euo pipefail
for tool in node npm; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool here"; exit 77; }
done
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"

echo '{"private": true}' >package.json
npm install --no-audit --no-fund @aliyun-sls/web-track-browser@0.3.9 @aliyun-sls/web-track-base@0.3.9 \
    @aliyun-sls/web-base@0.3.9 @aliyun-sls/web-types@0.3.9 >npm.log 2>&1 || { cat npm.log; exit 1; }

cat >track.js <<'JS'
const assert = require("assert");

// As much of a browser as the tracker asks for.
const bodies = [];
global.window = { addEventListener: () => {} };
const sendBeacon = (url, body) => bodies.push(body) > 0;
Object.defineProperty(global, "navigator", { value: { sendBeacon }, configurable: true });
const Tracker = require("@aliyun-sls/web-track-browser");

const tracker = new Tracker({ host: "sls.test", project: "project", logstore: "logstore" });
const fields = {
  page: "/cart",
  error: new TypeError("price is undefined"),
  at: new Date(0),
  link: new URL("http://shop.test/cart"),
  items: new Map([["apple", 2]]),
  user: undefined,
};
const EXPECTED = {
  page: "/cart", error: "{}", at: '"1970-01-01T00:00:00.000Z"', link: '"http://shop.test/cart"', items: "{}",
  user: "undefined",
};
tracker.sendImmediate(fields);
tracker.sendImmediate(new TypeError("price is undefined"));
setImmediate(() => {
  const [log, bare] = bodies.map((body) => JSON.parse(body).__logs__[0]);
  for (const name in fields) console.log(`  ${name}: ${String(fields[name])}  ->  ${log[name]}`);
  console.log(`  the error itself  ->  ${JSON.stringify(bare)}`);
  assert.deepStrictEqual(log, EXPECTED);
  assert.deepStrictEqual(bare, {});
});
JS

echo "@aliyun-sls/web-track-browser 0.3.9, node $(node --version)"
echo "expected: the error's message, a date without quotes, no field that is undefined"
echo "seen:"
if node track.js; then
    echo "so it is still: errors arrive as {}"
else
    echo "no longer as described"
    exit 1
fi
