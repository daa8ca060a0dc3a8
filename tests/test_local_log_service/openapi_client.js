// Does for the OpenAPI SDK of Node, @alicloud/sls20201230, what openapi_client.py does for that of Python, with the same
// calls: methods and fields are given as Python spells them, get_cursor and from_ for getCursor and from.
'use strict';

require('./loopback');

const models = require('@alicloud/sls20201230');
const { Config } = require('@alicloud/openapi-core').$OpenApiUtil;

const camel = (name) => name.replace(/_$/, '').replace(/_./g, (pair) => pair[1].toUpperCase());
const camels = (fields) => Object.fromEntries(Object.entries(fields).map(([name, value]) => [camel(name), value]));

const revive = (key, value) => {
  const [name] = value && typeof value === 'object' && !Array.isArray(value) ? Object.keys(value) : [];
  return models[name] ? new models[name](camels(value[name])) : value;
};

async function main() {
  const [settings, proxy, calls] = JSON.parse(process.argv[2], revive);
  const endpoint = `${settings.endpoint}:${new URL(proxy).port}`;
  const client = new models.default(new Config({ protocol: 'http', ...camels(settings), endpoint }));
  const outcomes = [];
  for (const [method, ...parameters] of calls) {
    try {
      outcomes.push({ answer: (await client[camel(method)](...parameters)).body || null });
    } catch (error) {
      outcomes.push({ error: error.message });
    }
  }
  process.stdout.write(JSON.stringify(outcomes));
  process.exit(0); // its agent would keep connections, and so the process, alive
}

main();
