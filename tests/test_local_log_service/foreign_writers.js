// What writes logs in JavaScript into one logstore: the Node SDK, and the tracker of a web page, for
// test_foreign_clients.py. Arguments: the endpoint without a scheme but with its port, a project, a logstore.
'use strict';

const http = require('http');

require('./loopback');

// As much of a browser as the tracker asks for.
const answers = [];
const post = (url, body) =>
  answers.push(
    new Promise((resolve, reject) => {
      const request = http.request(url, { method: 'POST' }, (response) => {
        response.resume().on('end', () => resolve(response.statusCode));
      });
      request.on('error', reject);
      request.end(body);
    }),
  );
global.window = {
  addEventListener: () => {},
  XMLHttpRequest: class {
    open(method, url) {
      this.url = url;
    }
    send(body) {
      post(this.url, body);
    }
  },
};
const sendBeacon = (url, body) => {
  post(url, body);
  return true;
};
Object.defineProperty(global, 'navigator', { value: { sendBeacon }, configurable: true });

const Client = require('@alicloud/log');
const Tracker = require('@aliyun-sls/web-track-browser');

async function main() {
  const [endpoint, project, logstore] = process.argv.slice(2);
  const client = new Client({ endpoint, accessKeyId: 'local-id', accessKeySecret: 'local-secret' });
  for (const topic of ['nginx', 'sql_audit', 'click', undefined]) {
    for (const timestamp of [Math.floor(Date.now() / 1000), Date.now()]) { // milliseconds are a mistake: another year
      const logs = [{ timestamp, timestampNsPart: 5, content: { node: `${topic}` } }, { timestamp, content: {} }];
      await client.postLogStoreLogs(project, logstore, { logs, topic, tags: [{ k: 'v' }, { k: 'w' }] });
    }
    const host = `http://${project}.${endpoint}`;
    const tracker = new Tracker({ host, project, logstore, topic, source: 'page', tags: { page: 'a b' }, time: 1, count: 1 });
    tracker.sendImmediate({ clicked: topic, nested: { a: 1 } });
    tracker.sendBatchLogs(Array.from({ length: 5000 }, (_, number) => ({ number, text: 'täglich' })));
  }
  process.stdout.write(JSON.stringify(await Promise.all(answers)));
  process.exit(0);
}

main();
